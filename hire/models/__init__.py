"""The decoder to which HiRE is applied: configurations, trained weights and text generation."""

from hire.models.cache import Cache
from hire.models.config import DecoderConfig, preset
from hire.models.conversion import convert
from hire.models.decoder import Decoder
from hire.models.generation import generate
from hire.models.loading import TextModel, load

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "TextModel",
    "convert",
    "generate",
    "load",
    "preset",
]
