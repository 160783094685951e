"""The family of Shampoo and SOAP: preconditioners of blocks, owned by ranks."""
