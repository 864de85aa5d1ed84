"""The mechanism of Eq. 9 and what it costs: clipping, noise, sampling, accounting."""
