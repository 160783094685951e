"""The family of K-FAC: Kronecker factors of layers that a model is watched for."""
