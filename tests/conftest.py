"""What all tests share: one thread, and no deadline for examples on a busy machine."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
