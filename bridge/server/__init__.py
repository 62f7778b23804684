"""Explanations on localhost, over HTTP."""
