"""The code that all runners share, which plans runs, opens backbones, and learns and judges concepts."""
