"""The decoder that HiRE is applied to: configurations, Gemma 3 with real weights, generation."""

from hire.models.config import DecoderConfig, preset
from hire.models.convert import convert
from hire.models.decoder import Cache, Decoder
from hire.models.generation import generate
from hire.models.weights import TextModel, load_gemma, load_text_model

__all__ = ["Cache", "Decoder", "DecoderConfig", "TextModel", "convert", "generate", "load_gemma", "load_text_model", "preset"]
