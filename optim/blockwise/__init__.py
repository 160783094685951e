"""The family of Shampoo, SOAP and Muon: blocks of matrices, owned by ranks."""
