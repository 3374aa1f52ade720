"""Fast feedforward layers for models: the layers, their penalties, and the surgery that puts them into open_clip."""
