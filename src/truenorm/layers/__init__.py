"""The layers, what surrounds them (conversion, recalibration, commits), and their arithmetic."""
