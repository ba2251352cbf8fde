"""Where patches start, and the static buffers that carry them through a jitted step."""
