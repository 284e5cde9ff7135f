"""One thread for torch: tiny tensors gain nothing from more, and lose much where the machine is busy."""

import torch

torch.set_num_threads(1)
