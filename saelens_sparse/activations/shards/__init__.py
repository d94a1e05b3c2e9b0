"""Activations in memory-mappable shards: safetensors files and a manifest."""
