"""The layers, what surrounds them (conversion, recalibration, commits), and their arithmetic."""

from truenorm.moved import names_of

__getattr__ = names_of("layers")
