"""What is wrong with a machine, a file or a message that somebody got, and what mends it.

Imports nothing by itself: :mod:`acmix_deploy.doctor.pasted` works where packages are broken.
"""
