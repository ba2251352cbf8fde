"""Patches: the rules that place them, and the buffers that carry them through a jitted step."""
