"""The decoder to which HiRE is applied: configurations, Gemma 3 weights and text generation."""

from hire.models.cache import Cache
from hire.models.config import DecoderConfig, preset
from hire.models.conversion import convert
from hire.models.decoder import Decoder
from hire.models.generation import generate
from hire.models.weights import TextModel, load_gemma, load_text_model

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "TextModel",
    "convert",
    "generate",
    "load_gemma",
    "load_text_model",
    "preset",
]
