"""Trackers for TensorBoard, W&B, MLflow and CSV, which `watch(trackers=...)` takes as names or objects."""
