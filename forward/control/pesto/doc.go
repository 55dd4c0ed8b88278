// Package pesto speaks the protocol by which pesto(1) changes the forwards of a
// pasta(1) that runs: both sides of it, the server for a Forwarder and the client
// for the command line. What is known of it was seen on the socket of passt
// 2026_10_02.cba3570.
//
// # Theory of operation
//
// The socket is a UNIX stream. All numbers are big-endian, all sizes fixed:
//
//	server  8 bytes "basil:s\0", version 2, size of a table's name, size of an
//	        interface's name
//	        for each table: its number (a byte), its name, capabilities, count,
//	        and count rules of 56 bytes; then a zero byte
//	client  nothing, or
//	        for each table: its number, count, and all the rules it is to have;
//	        then a zero byte
//
// There the protocol ends: pasta tells no client what became of it. Ours does: a
// client that shuts down its writing side only, and reads on, gets a JSON object
// of [control.Failure]'s shape, an empty one for "done". pasta closes the
// connection instead, and resets it if it did not take the tables. pesto itself
// closes at once, and is never told; what was refused is in the log then.
//
// Clients send whole tables, but the server takes them for a difference: what is
// not in the table that it showed to this client is added, what is missing is
// removed, in one [forward.Change]. So nothing is touched that the client did not
// mean, two clients at a time lose nothing of each other's, and what the protocol
// has no words for, such as a forward of a UNIX socket, is neither shown nor lost.
//
// Clients are served one after the other, in the order in which they came: the
// next is shown what the last one has sent, even though that has gone without
// waiting. One that makes the others wait is overtaken after a moment, and dropped
// after [control.Timeout]. Nothing in the data path waits for any of them.
package pesto
