"""What our figures are held against: C over the same sockets, and gRPC."""
