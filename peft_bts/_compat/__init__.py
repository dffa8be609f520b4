"""Every touch of other libraries' insides, by library.

Each function says what the library does, which is why the function is there, and what would let it go. All was read
in PEFT 0.21.2, transformers 5.23.0, accelerate 1.15.0 and bitsandbytes 0.50.2.
"""
