"""Token mixers with memories of special kinds: several that tokens are routed to, and a window told by polynomials.

They are recurrent mixers as those of the folder above are; `models.mixers.build` alone imports them.
"""
