"""Policies that domain experts write: read, enforced in the joint sampler, and checked on a finished selection."""
