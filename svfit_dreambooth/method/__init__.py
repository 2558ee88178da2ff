"""The method on a layer and on a model; knows torch and nothing of diffusers."""
