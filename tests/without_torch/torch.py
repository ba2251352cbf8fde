"""Stands before PyTorch on the path of the processes that tests start: they must not need it."""

raise ImportError("the package does without PyTorch")
