"""Distillation: what a teacher hands over, and students whose layers have other mixers than their teacher's."""
