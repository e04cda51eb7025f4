"""Alternatives that HiRE is compared with."""
