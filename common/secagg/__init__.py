"""Secure aggregation with shared noise: the server learns the noised sum of all sites, nothing else.

`assumptions` says how many sites may fail or collude, and what follows for thresholds, noise and accounting. `quantise`
turns a site's clipped sums into integers with a share of the noise, and the sum of all back into tensors. `site` and
`server` are the two sides of the protocol (Bonawitz et al. 2017) as pure functions over bytes and arrays, on the
primitives of `primitives` and `shamir`. Nothing here talks to a network, a disk or a clock.
"""
