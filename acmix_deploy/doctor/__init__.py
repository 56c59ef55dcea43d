"""What is wrong with a machine or a file, and what mends it."""

from acmix_deploy.doctor.diagnosis import Component, Diagnosis, Examination, Finding
from acmix_deploy.doctor.files import examine
from acmix_deploy.doctor.machine import environment

__all__ = ["Component", "Diagnosis", "Examination", "Finding", "environment", "examine"]
