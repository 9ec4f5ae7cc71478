"""Files of the VM and its containers, as hosts write and read them."""
