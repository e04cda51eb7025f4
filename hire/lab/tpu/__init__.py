"""Estimates of TPU time by the TPU compiler."""
