"""Transformers that learn tractography: TTS, TTST and TTO."""
