"""Small tensors, many steps: one thread is faster, and leaves the other cores to other tests."""

import torch

torch.set_num_threads(1)
