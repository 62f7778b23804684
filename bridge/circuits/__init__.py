"""Circuits of tasks: searched for, judged and compared, in the sparse and in the dense model."""
