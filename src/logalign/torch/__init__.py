"""The producer for PyTorch: which layer is measured, and its sums, taken on the device inside forward hooks."""
