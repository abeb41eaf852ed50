"""Token mixers with memories of special kinds: routed ones, a window told by polynomials, a prompt that is seen first.

They are recurrent mixers as those of the folder above are; `models.mixers.build` alone imports them.
"""
