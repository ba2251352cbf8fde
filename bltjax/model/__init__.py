"""The model; everything outside reaches it through `functional`."""
