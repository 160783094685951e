"""The branched critical batch size: from one checkpoint, how large may the batch be?"""
