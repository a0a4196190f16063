"""Dense tasks: quantities of every pixel, such as depth or classes.

A data set lists its tasks. Feedback heads, probes and pictures loop over that list.

Letters for shapes: B images, C outputs, H W pixels, h w patches.
"""
