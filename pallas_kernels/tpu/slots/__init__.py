"""What decoding over the slots of a cache shares on TPUs: the online softmax, and slots in codes."""
