"""A stand-in for PyObjC's `Metal` on machines without Metal, and a device that uses it."""

from metal_ops._standin._metal import StandIn
from metal_ops._standin._open import open_emulated_device
from metal_ops._standin._rules import MetalRuleError

__all__ = ["MetalRuleError", "StandIn", "open_emulated_device"]
