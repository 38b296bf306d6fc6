"""Beam `RunInference` handlers for CLIP, BLIP and BLIP-2, and the code that they share."""
