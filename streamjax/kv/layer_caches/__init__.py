"""What layers keep that is not a choice of the user: a chunk, a recurrent state, or the slots of another layer."""
