"""Trackers: TensorBoard, W&B, MLflow, CSV; `watch(trackers=...)` takes their names or objects."""
