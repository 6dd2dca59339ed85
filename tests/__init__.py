"""The tests of `ccm`: on a CPU, without a network, in minutes."""
