"""Token mixers with memories of special kinds: several that tokens are routed to, a window
told by polynomials, and one that has looked at all of a prompt.

They are recurrent mixers as those of the folder above are; `models.mixers.build` alone imports them.
"""
