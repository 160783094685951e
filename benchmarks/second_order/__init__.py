"""`largebatch bench second_order`: the time of Shampoo, SOAP and K-FAC beside peers."""
