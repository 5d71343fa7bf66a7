"""The least that a call from Python into native code costs."""


cdef class Floor:

    def call(self, request_id):
        """Does nothing with one argument."""
        return None
