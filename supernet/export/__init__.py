"""Write a subnet to a file, run the file, and prove that it is the same network."""
