"""The code that all runners share: it plans runs, opens backbones, and learns and judges concepts."""
