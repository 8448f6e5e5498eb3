"""What published decoders do that looks unintended, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirks:
    """What published decoders do that looks unintended; all off unless their output is to be reproduced.

    Args:
        propose_mask: the mask may be proposed; a position that commits it stays masked, and its quota is lost (LLaDA).
        leave_masks: what is masked after the last step stays masked, instead of being filled with the likeliest tokens.
        noisy_fill: a row that halts is filled with the policy's proposals, which at a temperature are drawn (Prophet).
        extra_call: a block makes one more call although the one that filled the cache completed it (Fast-dLLM, 2025).
        first_from_full: the call that fills the cache decides the first position of the block and nothing else, and
            later calls do not see the position before the block (Fast-dLLM for Dream).
    """

    propose_mask: bool = False
    leave_masks: bool = False
    noisy_fill: bool = False
    extra_call: bool = False
    first_from_full: bool = False
