"""The text part of the lab: small text encoders that know language, with and without backdoors."""
