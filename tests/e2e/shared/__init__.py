"""Tests of one cluster, which is made once for all of them."""
