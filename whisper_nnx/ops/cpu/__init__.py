"""CPUs: their operations, and kernels in C++ that are compiled at first use."""
